"""One flat module a training method: settings, data, model, train, save, top to bottom."""
