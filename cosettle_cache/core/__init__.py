"""What every room uses: types, errors, settings, files, tables, console, parallel work, clusters of workers.

Nothing here imports torch or zarr, or any other room.
"""
