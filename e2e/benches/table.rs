//! The figures: one row each, with what the specification allows.

use serde_json::{Value, json};
use std::fmt::Write as _;

/// What a figure is held against.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Limit {
    /// Not more than.
    Most(f64),
    /// Not less than.
    Least(f64),
    /// Told only.
    None,
}

/// A figure.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    /// Names it in bench.json, for good.
    pub id: String,
    /// For people.
    pub what: String,
    /// The figure.
    pub ours: f64,
    /// As in `µs`.
    pub unit: &'static str,
    /// The limit.
    pub limit: Limit,
}

impl Row {
    /// Whether the limit holds.
    pub(crate) fn holds(&self) -> bool {
        match self.limit {
            Limit::Most(most) => self.ours <= most,
            Limit::Least(least) => self.ours >= least,
            Limit::None => true,
        }
    }
}

/// All figures of a run.
#[derive(Debug, Default)]
pub(crate) struct Table {
    /// In the order of measuring.
    pub rows: Vec<Row>,
}

impl Table {
    /// Adds a figure, and shows it at once.
    pub(crate) fn add(&mut self, id: &str, what: &str, ours: f64, unit: &'static str, limit: Limit) {
        let row = Row { id: id.to_owned(), what: what.to_owned(), ours, unit, limit };
        eprintln!("   {:<74} {} {unit}", row.what, number(ours));
        self.rows.push(row);
    }

    /// As Markdown, which reads well on a terminal, too.
    pub(crate) fn text(&self) -> String {
        let cells = |row: &Row| {
            let limit = match row.limit {
                Limit::Most(most) => format!("≤ {} {}", number(most), row.unit),
                Limit::Least(least) => format!("≥ {} {}", number(least), row.unit),
                Limit::None => "–".to_owned(),
            };
            let verdict = if row.holds() { "" } else { "missed" };
            vec![row.what.clone(), format!("{} {}", number(row.ours), row.unit), limit, verdict.to_owned()]
        };
        let mut lines: Vec<Vec<String>> = vec![["what", "ours", "limit", ""].map(str::to_owned).to_vec()];
        lines.extend(self.rows.iter().map(cells));
        let columns = lines[0].len();
        let widths: Vec<usize> = (0..columns)
            .map(|at| lines.iter().map(|line| line[at].chars().count()).max().unwrap_or(0).max(1))
            .collect();
        lines.insert(1, widths.iter().map(|width| "-".repeat(*width)).collect());
        let mut text = String::new();
        for line in lines {
            for (cell, width) in line.iter().zip(&widths) {
                let _ = write!(text, "| {cell}{} ", " ".repeat(width - cell.chars().count()));
            }
            text.push_str("|\n");
        }
        text
    }

    /// For `target/bench.json`.
    pub(crate) fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            let (most, least) = match row.limit {
                Limit::Most(most) => (Some(most), None),
                Limit::Least(least) => (None, Some(least)),
                Limit::None => (None, None),
            };
            json!({"id": row.id, "what": row.what, "ours": row.ours, "unit": row.unit, "most": most, "least": least,
                   "holds": row.holds()})
        });
        rows.collect()
    }
}

/// Three digits that count.
fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 || v.fract() == 0.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}
