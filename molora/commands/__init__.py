"""The commands of ``molora``, one module each. Their imports at the top are light: what is heavy is imported when a
command runs."""
