"""Training and test data: manifests of records, folders of examples, holes in their pictures."""
