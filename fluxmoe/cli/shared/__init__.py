"""Parts of the command line that several verbs share: options, output, models and hardware."""
