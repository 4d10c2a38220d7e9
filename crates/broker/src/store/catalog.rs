//! What tables a store has: for backups, which take all of them, whatever a later version adds.

use super::{StoreError, Tx, params};

impl Tx<'_> {
    /// Version of the tables.
    pub fn version(&self) -> Result<i64, StoreError> {
        self.value("SELECT max(version) FROM migrations", params![])
    }

    /// Names of all tables.
    pub fn tables(&self) -> Result<Vec<String>, StoreError> {
        let sql = match self.is_postgres() {
            true => "SELECT tablename::text FROM pg_tables WHERE schemaname = current_schema()",
            false => {
                "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'"
            }
        };
        self.rows(sql, params![], |row| row.get(0))
    }

    /// Names of a table's columns, in their order.
    pub fn columns(&self, table: &str) -> Result<Vec<String>, StoreError> {
        let sql = match self.is_postgres() {
            true => {
                "SELECT column_name::text FROM information_schema.columns \
                 WHERE table_schema = current_schema() AND table_name = ?1 ORDER BY ordinal_position"
            }
            false => "SELECT name FROM pragma_table_info(?1)",
        };
        self.rows(sql, params![table], |row| row.get(0))
    }

    /// Names of the columns of a table's primary key, in its order.
    pub fn key(&self, table: &str) -> Result<Vec<String>, StoreError> {
        let sql = match self.is_postgres() {
            true => {
                "SELECT k.column_name::text FROM information_schema.key_column_usage k \
                 JOIN information_schema.table_constraints c \
                 ON c.constraint_schema = k.constraint_schema AND c.constraint_name = k.constraint_name \
                 AND c.table_name = k.table_name \
                 WHERE c.table_schema = current_schema() AND c.table_name = ?1 \
                 AND c.constraint_type = 'PRIMARY KEY' ORDER BY k.ordinal_position"
            }
            false => "SELECT name FROM pragma_table_info(?1) WHERE pk > 0 ORDER BY pk",
        };
        self.rows(sql, params![table], |row| row.get(0))
    }

    /// After rows came in with numbers of their own: the next number is behind them. SQLite knows by itself.
    pub fn restart_sequences(&self) -> Result<(), StoreError> {
        if !self.is_postgres() {
            return Ok(());
        }
        let sql = "SELECT table_name::text, column_name::text FROM information_schema.columns \
             WHERE table_schema = current_schema() AND is_identity = 'YES'";
        let columns = self.rows(sql, params![], |row| Ok((row.get(0)?, row.get(1)?)))?;
        columns.iter().try_for_each(|(table, column): &(String, String)| {
            self.batch(&format!(
                "SELECT setval(pg_get_serial_sequence('{table}', '{column}'), \
                 (SELECT coalesce(max({column}), 0) + 1 FROM {table}), false)"
            ))
        })
    }
}
