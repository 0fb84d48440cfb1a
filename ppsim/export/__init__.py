"""Export: traces handed on to other tools and to readers."""
