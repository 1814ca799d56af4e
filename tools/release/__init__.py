"""What a release carries: workflows, thumbnails and the pictures of the help pages."""
