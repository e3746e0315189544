"""What people see of a run: progress, pictures, MLflow."""
