"""The schedules of the field, each one function that writes one rank's order (or every rank's, where its rule sees all
ranks at once), and the registry that knows them by name."""
