-- When a running sandbox was paused; absent while it runs.
ALTER TABLE sandboxes ADD COLUMN paused_ms INTEGER;

-- The pool whose member the sandbox is, until it is claimed.
ALTER TABLE sandboxes ADD COLUMN pool_id TEXT;

CREATE INDEX pool_members ON sandboxes (pool_id) WHERE pool_id IS NOT NULL;

-- Machines as they were at one moment, to start others from.
CREATE TABLE snapshots (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    -- `making` and `deleting` belong to a process; without it they are leftovers.
    state TEXT NOT NULL CHECK (state IN ('making', 'ready', 'deleting')),
    sandbox TEXT NOT NULL,
    image TEXT NOT NULL,
    image_digest TEXT NOT NULL,
    kernel TEXT NOT NULL,
    cpus INTEGER NOT NULL,
    memory_mib INTEGER NOT NULL,
    disk_mib INTEGER NOT NULL,
    disk_mode TEXT NOT NULL CHECK (disk_mode IN ('isolated', 'memory')),
    workdir TEXT,
    user TEXT,
    created_ms INTEGER NOT NULL,
    boot_id TEXT,
    holder_pid INTEGER,
    holder_start INTEGER
) STRICT;

CREATE TABLE snapshot_env (
    snapshot_id TEXT NOT NULL REFERENCES snapshots (id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (snapshot_id, name)
) STRICT;

-- Sandboxes made ahead of demand.
CREATE TABLE pools (
    id TEXT PRIMARY KEY,
    image TEXT NOT NULL,
    cpus INTEGER NOT NULL,
    memory_mib INTEGER NOT NULL,
    disk_mib INTEGER NOT NULL,
    disk_mode TEXT NOT NULL CHECK (disk_mode IN ('isolated', 'memory')),
    size INTEGER NOT NULL,
    hits INTEGER NOT NULL DEFAULT 0,
    misses INTEGER NOT NULL DEFAULT 0,
    -- Why the last filling ended early.
    failure TEXT,
    created_ms INTEGER NOT NULL,
    UNIQUE (image, cpus, memory_mib, disk_mib, disk_mode)
) STRICT;

-- What a member runs, each line in a shell, before it is parked.
CREATE TABLE pool_commands (
    pool_id TEXT NOT NULL REFERENCES pools (id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    command TEXT NOT NULL,
    PRIMARY KEY (pool_id, position)
) STRICT;
