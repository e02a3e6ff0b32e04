"""Side by side with what people would use instead; README.md beside this file states the method first."""
