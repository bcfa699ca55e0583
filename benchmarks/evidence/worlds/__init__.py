"""The worlds: modules with NAME, TITLE, train(), evaluate() and latency() (`..runs`)."""
