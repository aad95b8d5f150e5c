"""MLflow: connecting to it, its runs, versions of a model.

Besides :mod:`ldm.registry`, :mod:`ldm.registered`, and :mod:`ldm.serving` that MLflow itself runs,
nothing imports mlflow. It is imported late: it reads its settings, telemetry among them, while it
is imported.
"""
