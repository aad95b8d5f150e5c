"""MLflow: connecting to it, its runs, versions of a model; a training as it goes.

Nothing but this and :mod:`ldm.registry` imports mlflow. It is imported late: it reads its settings,
telemetry among them, while it is imported.
"""
