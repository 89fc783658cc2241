"""Frozen encoders: normalised images in, dense patch tokens out.

A registry table (no torch) names the published encoders; small converters bring every checkpoint layout to
one model class. Importing the package costs nothing: torch and timm are imported when an encoder is loaded.
"""
