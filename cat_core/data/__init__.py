"""Training and test data: manifests of records, folders of examples, and the holes cut into their pictures."""
