"""What people see of a run: pictures, charts, the summary."""
