-- Where each sandbox has a network of its own, addresses may be the same. SQLite changes a constraint
-- only by making the table anew.
CREATE TEMP TABLE sandbox_networks_before AS SELECT * FROM sandbox_networks;
DROP TABLE sandbox_networks;

-- What a sandbox that runs has of the network. Written before anything of it is made.
CREATE TABLE sandbox_networks (
    sandbox_id TEXT PRIMARY KEY REFERENCES sandboxes (id) ON DELETE CASCADE,
    -- Where device and rules are: on the host, or in a network namespace of the keeper's own, with
    -- which they go.
    mode TEXT NOT NULL CHECK (mode IN ('tap', 'user')),
    -- As a number, so that the next free one can be found by counting.
    address INTEGER NOT NULL CHECK (address BETWEEN 0 AND 4294967295),
    device TEXT NOT NULL UNIQUE CHECK (length(device) = 15),
    -- 48 random bits, new with every start: connections are known by them.
    run INTEGER NOT NULL
) STRICT;

CREATE UNIQUE INDEX sandbox_networks_by_address ON sandbox_networks (address) WHERE mode = 'tap';

INSERT INTO sandbox_networks SELECT sandbox_id, mode, address, device, run FROM sandbox_networks_before;
DROP TABLE sandbox_networks_before;
