//! The figures: one row each, with what the specification allows and, in a run beside it, what the peer takes.

use serde_json::{Value, json};
use std::fmt::Write as _;

/// Whose figures are measured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Side {
    /// Ours.
    #[default]
    Ours,
    /// The AWS Load Balancer Controller's.
    Peer,
}

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
    /// The peer's, if it has one.
    pub peer: Option<f64>,
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

    /// The peer's figure in ours.
    fn ratio(&self) -> Option<f64> {
        self.peer.map(|peer| peer / self.ours).filter(|ratio| ratio.is_finite())
    }
}

/// All figures of a run.
#[derive(Debug, Default)]
pub(crate) struct Table {
    /// In the order of measuring.
    pub rows: Vec<Row>,
    /// Whether a peer is measured in the same run.
    pub beside: bool,
    /// Whose figures are added.
    pub side: Side,
}

impl Table {
    /// Adds a figure, and shows it at once. The peer's goes beside ours of the same name, and nowhere if there is none.
    pub(crate) fn add(&mut self, id: &str, what: &str, figure: f64, unit: &'static str, limit: Limit) {
        if self.side == Side::Ours {
            let row = Row { id: id.to_owned(), what: what.to_owned(), ours: figure, peer: None, unit, limit };
            self.rows.push(row);
        } else if let Some(row) = self.rows.iter_mut().find(|row| row.id == id) {
            row.peer = Some(figure);
        }
        eprintln!("   {what:<74} {} {unit}", number(figure));
    }

    /// As Markdown, which reads well on a terminal, too.
    pub(crate) fn text(&self) -> String {
        let cells = |row: &Row| {
            let limit = match row.limit {
                Limit::Most(most) => format!("≤ {} {}", number(most), row.unit),
                Limit::Least(least) => format!("≥ {} {}", number(least), row.unit),
                Limit::None => "–".to_owned(),
            };
            let peer = row.peer.map_or("–".to_owned(), |peer| format!("{} {}", number(peer), row.unit));
            let ratio = row.ratio().map(|ratio| format!(" ({})", number(ratio))).unwrap_or_default();
            let verdict = if row.holds() { "" } else { "missed" }.to_owned();
            let ours = format!("{} {}", number(row.ours), row.unit);
            vec![row.what.clone(), ours, format!("{peer}{ratio}"), limit, verdict]
        };
        let heads = ["what", "ours", "peer (in ours)", "limit", ""].map(str::to_owned).to_vec();
        let mut lines: Vec<Vec<String>> = std::iter::once(heads).chain(self.rows.iter().map(cells)).collect();
        if !self.beside {
            for line in &mut lines {
                line.remove(2);
            }
        }
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
            let mut figure = json!({"id": row.id, "what": row.what, "ours": row.ours, "unit": row.unit, "most": most,
                                    "least": least, "holds": row.holds()});
            if self.beside {
                figure["peer"] = json!(row.peer);
                figure["peer_in_ours"] = json!(row.ratio());
            }
            figure
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

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(beside: bool) -> Table {
        let mut table = Table { beside, ..Table::default() };
        table.add("binary", "binary", 20.0, "MB", Limit::Most(20.0));
        table.add("conversion", "conversion", 41.0, "µs", Limit::Most(40.0));
        table.add("calls", "calls", 0.0, "calls", Limit::None);
        table
    }

    #[test]
    fn without_a_peer_nothing_speaks_of_one() {
        let table = measured(false);
        let lines =
            ["| what       | ours    | limit   |        |", "| conversion | 41 µs   | ≤ 40 µs | missed |"];
        assert!(lines.iter().all(|line| table.text().contains(line)), "{}", table.text());
        assert_eq!(table.json()[0].get("peer"), None);
    }

    #[test]
    fn the_peer_stands_beside_the_same_figure_of_ours() {
        let mut table = measured(true);
        table.side = Side::Peer;
        table.add("calls", "calls", 2.0, "calls", Limit::None);
        table.add("binary", "binary", 98.0, "MB", Limit::None);
        table.add("webhooks", "which ours has not", 1.0, "", Limit::None);
        let text = table.text();
        for line in [
            "| what       | ours    | peer (in ours) | limit   |        |",
            "| binary     | 20 MB   | 98 MB (4.90)   | ≤ 20 MB |        |",
            "| conversion | 41 µs   | –              | ≤ 40 µs | missed |",
            "| calls      | 0 calls | 2 calls        | –       |        |",
        ] {
            assert!(text.contains(line), "{text}");
        }
        assert_eq!(table.rows.len(), 3);
        let figures = table.json();
        assert_eq!((&figures[0]["peer"], &figures[0]["peer_in_ours"]), (&json!(98.0), &json!(4.9)));
        assert_eq!((&figures[2]["peer"], &figures[2]["peer_in_ours"]), (&json!(2.0), &Value::Null));
        assert_eq!(figures[1]["peer"], Value::Null);
    }
}
