-- Disks that outlive the sandboxes which use them.
CREATE TABLE volumes (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    -- `making` and `deleting` belong to a process; without it they are leftovers.
    state TEXT NOT NULL CHECK (state IN ('making', 'ready', 'deleting')),
    size_mib INTEGER NOT NULL,
    created_ms INTEGER NOT NULL,
    boot_id TEXT,
    holder_pid INTEGER,
    holder_start INTEGER
) STRICT;

-- Which volumes a sandbox has, and where. A volume is not removed while it is in here.
CREATE TABLE sandbox_volumes (
    sandbox_id TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    volume_id TEXT NOT NULL REFERENCES volumes (id) ON DELETE RESTRICT,
    target TEXT NOT NULL,
    read_only INTEGER NOT NULL CHECK (read_only IN (0, 1)),
    PRIMARY KEY (sandbox_id, position),
    UNIQUE (sandbox_id, volume_id),
    UNIQUE (sandbox_id, target)
) STRICT;

CREATE INDEX sandboxes_of_volume ON sandbox_volumes (volume_id);

-- Which directories of the host a sandbox sees, and where.
CREATE TABLE sandbox_mounts (
    sandbox_id TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    source TEXT NOT NULL,
    target TEXT NOT NULL,
    read_only INTEGER NOT NULL CHECK (read_only IN (0, 1)),
    PRIMARY KEY (sandbox_id, position),
    UNIQUE (sandbox_id, target)
) STRICT;
