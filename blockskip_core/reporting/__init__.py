"""What users see of a run: pictures, charts, the summary."""
