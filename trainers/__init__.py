"""One stage at a time: models, objectives, the step, DeepSpeed, checkpoints, predicting and scoring.

It knows no study, no Ray Tune and no MLflow.
"""
