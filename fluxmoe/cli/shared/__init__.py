"""Parts of the command line shared by several verbs: options, printing, models, hardware."""
