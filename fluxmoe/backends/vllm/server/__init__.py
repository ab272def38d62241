"""The process that serves HTTP: launching it, its settings, limits by request, ``/metrics``."""
