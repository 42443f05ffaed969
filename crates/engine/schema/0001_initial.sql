CREATE TABLE images (
    name TEXT PRIMARY KEY,
    digest TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    created_ms INTEGER NOT NULL,
    source TEXT NOT NULL
) STRICT;

CREATE TABLE sandboxes (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL CHECK (state IN
        ('created', 'starting', 'running', 'stopping', 'stopped', 'error', 'deleting')),
    reason TEXT,
    image TEXT NOT NULL,
    image_digest TEXT NOT NULL,
    kernel TEXT NOT NULL,
    cpus INTEGER NOT NULL,
    memory_mib INTEGER NOT NULL,
    disk_mib INTEGER NOT NULL,
    disk_mode TEXT NOT NULL CHECK (disk_mode IN ('isolated', 'shared', 'memory')),
    workdir TEXT,
    user TEXT,
    ttl_ms INTEGER,
    ephemeral INTEGER NOT NULL CHECK (ephemeral IN (0, 1)),
    engine TEXT,
    accel TEXT,
    created_ms INTEGER NOT NULL,
    started_ms INTEGER,
    stopped_ms INTEGER,
    boot_id TEXT,
    holder_pid INTEGER,
    holder_start INTEGER,
    vmm_pid INTEGER,
    vmm_start INTEGER
) STRICT;

CREATE TABLE sandbox_env (
    sandbox_id TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (sandbox_id, name)
) STRICT;

-- One sandbox at a time writes to the layer that belongs to an image.
CREATE UNIQUE INDEX one_shared_writer ON sandboxes (image_digest)
    WHERE disk_mode = 'shared' AND state IN ('starting', 'running', 'stopping');

CREATE TABLE host_facts (
    name TEXT PRIMARY KEY,
    boot_id TEXT NOT NULL,
    value TEXT NOT NULL
) STRICT;
