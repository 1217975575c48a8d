"""Communication with the page in the browser: progress and the live chart."""
