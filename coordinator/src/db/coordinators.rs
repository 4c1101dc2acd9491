//! Tables `coordinators` and `task_owners`: who lives, and who runs which background task.
use super::{Tx, column};
use crate::clock::Timestamp;
use crate::error::Error;

/// Gives a sign of life, good until a time, and forgets those who have not given one since `before`.
///
/// # Errors
/// When a query fails.
pub async fn coordinator_beat(
    tx: &mut Tx,
    id: &str,
    until: Timestamp,
    before: Timestamp,
) -> Result<(), Error> {
    sqlx::query(
        "insert into coordinators (id, alive_until_ms) values ($1, $2) \
         on conflict (id) do update set alive_until_ms = excluded.alive_until_ms",
    )
    .bind(id)
    .bind(until.0)
    .execute(tx.conn())
    .await?;
    sqlx::query("delete from coordinators where alive_until_ms < $1 and id <> $2")
        .bind(before.0)
        .bind(id)
        .execute(tx.conn())
        .await?;
    Ok(())
}

/// Takes leave: its tasks are free at once.
///
/// # Errors
/// When the query fails.
pub async fn coordinator_leave(tx: &mut Tx, id: &str) -> Result<(), Error> {
    sqlx::query("delete from coordinators where id = $1")
        .bind(id)
        .execute(tx.conn())
        .await?;
    Ok(())
}

/// Those who live, by id.
///
/// # Errors
/// When the query fails.
pub async fn coordinator_living(tx: &mut Tx, now: Timestamp) -> Result<Vec<String>, Error> {
    let rows = sqlx::query("select id from coordinators where alive_until_ms >= $1 order by id")
        .bind(now.0)
        .fetch_all(tx.conn())
        .await?;
    rows.iter().map(|row| column(row, "id")).collect()
}

/// Who runs a task, seen by one coordinator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// That coordinator.
    Own,
    /// Another one that lives.
    Another,
    /// Nobody who lives.
    Nobody,
}

/// Who runs a task.
///
/// # Errors
/// When the query fails.
pub async fn task_owner(tx: &mut Tx, task: &str, id: &str, now: Timestamp) -> Result<Owner, Error> {
    let row = sqlx::query(
        "select o.coordinator_id, c.alive_until_ms from task_owners o \
         left join coordinators c on c.id = o.coordinator_id where o.task = $1",
    )
    .bind(task)
    .fetch_optional(tx.conn())
    .await?;
    let Some(row) = row else {
        return Ok(Owner::Nobody);
    };
    let owner: String = column(&row, "coordinator_id")?;
    let alive_until: Option<i64> = column(&row, "alive_until_ms")?;
    Ok(if owner == id {
        Owner::Own
    } else if alive_until.is_some_and(|until| until > now.0) {
        Owner::Another
    } else {
        Owner::Nobody
    })
}

/// Takes a task that nobody who lives has. False: somebody was faster.
///
/// # Errors
/// When the query fails.
pub async fn task_take(tx: &mut Tx, task: &str, id: &str, now: Timestamp) -> Result<bool, Error> {
    let done = sqlx::query(
        "insert into task_owners (task, coordinator_id) values ($1, $2) on conflict (task) \
         do update set coordinator_id = excluded.coordinator_id where not exists \
         (select 1 from coordinators c where c.id = task_owners.coordinator_id \
          and c.id <> $2 and c.alive_until_ms > $3)",
    )
    .bind(task)
    .bind(id)
    .bind(now.0)
    .execute(tx.conn())
    .await?;
    Ok(done.rows_affected() == 1)
}
