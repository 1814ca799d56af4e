"""The bundled demo model: its drawn world, its networks, its training, its judge and its ablation."""
