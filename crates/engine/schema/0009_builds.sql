-- What an image says beside its commands: LABEL,
CREATE TABLE image_labels (
    image TEXT NOT NULL REFERENCES images (name) ON DELETE CASCADE,
    name TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (image, name)
) STRICT;

-- and EXPOSE, as PORT/PROTOCOL.
CREATE TABLE image_ports (
    image TEXT NOT NULL REFERENCES images (name) ON DELETE CASCADE,
    port TEXT NOT NULL,
    PRIMARY KEY (image, port)
) STRICT;

-- Writable layers that builds keep, each found by everything that it came from. Its disk lies in a
-- directory named after its key, and is there before the row.
CREATE TABLE build_layers (
    key TEXT PRIMARY KEY CHECK (length(key) = 64),
    -- Root file system of the image that it is a layer over.
    base_digest TEXT NOT NULL,
    disk_mib INTEGER NOT NULL,
    -- The instruction, for people.
    step TEXT NOT NULL,
    -- Root file system of the image that was made of layer and base, if one was.
    image_digest TEXT,
    created_ms INTEGER NOT NULL
) STRICT;
