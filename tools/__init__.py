"""Programs for maintainers: mutation testing, fuzzing, checks of built packages."""
