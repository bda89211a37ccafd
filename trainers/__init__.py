"""One stage at a time: models, objectives, the step, DeepSpeed, checkpoints, predicting and scoring. Knows no study, no Ray Tune, no MLflow."""
