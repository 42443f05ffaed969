-- What a sandbox may reach: nothing, what is listed, or everything but what nobody may.
ALTER TABLE sandboxes ADD COLUMN network TEXT NOT NULL DEFAULT 'off'
    CHECK (network IN ('off', 'listed', 'open'));

-- Names and networks a sandbox may reach, in the order they were given.
CREATE TABLE sandbox_allowed (
    sandbox_id TEXT NOT NULL REFERENCES sandboxes (id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (sandbox_id, position)
) STRICT;

-- What a sandbox that runs has of the host's network. Written before anything of it is made.
CREATE TABLE sandbox_networks (
    sandbox_id TEXT PRIMARY KEY REFERENCES sandboxes (id) ON DELETE CASCADE,
    -- Where device and rules are: on the host, or in a network namespace of the keeper's own, with
    -- which they go.
    mode TEXT NOT NULL CHECK (mode IN ('tap', 'user')),
    -- As a number, so that the next free one can be found by counting.
    address INTEGER NOT NULL UNIQUE CHECK (address BETWEEN 0 AND 4294967295),
    device TEXT NOT NULL UNIQUE CHECK (length(device) = 15),
    -- 48 random bits, new with every start: connections are known by them.
    run INTEGER NOT NULL
) STRICT;

ALTER TABLE snapshots ADD COLUMN network TEXT NOT NULL DEFAULT 'off'
    CHECK (network IN ('off', 'listed', 'open'));

-- Whether the machine that was saved has a network device.
ALTER TABLE snapshots ADD COLUMN nic INTEGER NOT NULL DEFAULT 0 CHECK (nic IN (0, 1));

CREATE TABLE snapshot_allowed (
    snapshot_id TEXT NOT NULL REFERENCES snapshots (id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (snapshot_id, position)
) STRICT;

-- Pools of machines with a network device are others than those without. SQLite changes a constraint
-- only by making the table anew.
CREATE TEMP TABLE pools_before AS SELECT * FROM pools;
CREATE TEMP TABLE pool_commands_before AS SELECT * FROM pool_commands;
DROP TABLE pool_commands;
DROP TABLE pools;

CREATE TABLE pools (
    id TEXT PRIMARY KEY,
    image TEXT NOT NULL,
    cpus INTEGER NOT NULL,
    memory_mib INTEGER NOT NULL,
    disk_mib INTEGER NOT NULL,
    disk_mode TEXT NOT NULL CHECK (disk_mode IN ('isolated', 'memory')),
    nic INTEGER NOT NULL DEFAULT 0 CHECK (nic IN (0, 1)),
    size INTEGER NOT NULL,
    hits INTEGER NOT NULL DEFAULT 0,
    misses INTEGER NOT NULL DEFAULT 0,
    -- Why the last filling ended early.
    failure TEXT,
    created_ms INTEGER NOT NULL,
    UNIQUE (image, cpus, memory_mib, disk_mib, disk_mode, nic)
) STRICT;

CREATE TABLE pool_commands (
    pool_id TEXT NOT NULL REFERENCES pools (id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    command TEXT NOT NULL,
    PRIMARY KEY (pool_id, position)
) STRICT;

INSERT INTO pools SELECT id, image, cpus, memory_mib, disk_mib, disk_mode, 0, size, hits, misses,
    failure, created_ms FROM pools_before;
INSERT INTO pool_commands SELECT pool_id, position, command FROM pool_commands_before;
DROP TABLE pools_before;
DROP TABLE pool_commands_before;
