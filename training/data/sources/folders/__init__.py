"""Folders of images: lists of images, caption files, classes, and advice without usable data."""
