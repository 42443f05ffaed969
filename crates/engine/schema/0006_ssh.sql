-- Who may come in by SSH beside the owner of the data directory: public keys, one a line. Absent where
-- SSH is off.
ALTER TABLE sandboxes ADD COLUMN authorized_keys TEXT;
ALTER TABLE snapshots ADD COLUMN authorized_keys TEXT;
