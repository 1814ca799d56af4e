"""The bundled demo model: its drawn world, networks, training, judge and ablation."""
