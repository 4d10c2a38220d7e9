-- Version 5: what a VM takes from its node is not always known by its RAM: a clone of a template takes less.
ALTER TABLE jobs ADD COLUMN reserved_mib INTEGER NOT NULL DEFAULT 0;
UPDATE jobs SET reserved_mib = mem_mib + mem_mib / 64 + 24;
