"""What every room needs and that needs no room of ours: settings, errors, ids, context, telemetry."""
