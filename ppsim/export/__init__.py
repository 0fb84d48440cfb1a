"""Export: traces handed on to other tools and to readers. Import the module you need; this one imports none."""
