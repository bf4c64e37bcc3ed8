"""Files that ship inside an exported model folder: copied by the exporter, never imported from here."""
