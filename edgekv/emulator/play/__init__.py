"""Scenarios, the apps that they play, and what came out."""
