"""Puts a bundle and all that runs it onto a device over ssh or adb, and holds its tokens against those of this machine."""
