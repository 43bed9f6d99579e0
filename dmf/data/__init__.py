"""From datasets on disk to global batches on the mesh."""
