"""Parts of the command line that several verbs use: options, printing, models, hardware."""
