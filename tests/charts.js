// A stand-in for Google Charts where its server cannot be reached. It shows each chart as a list of
// its values, below the names of their columns.
(() => {
  class DataTable {
    constructor() { this.columns = []; this.rows = []; }
    addColumn(kind, label) { this.columns.push(label ?? kind.label ?? kind.role ?? ""); }
    addRow(row) { this.rows.push(row); }
    addRows(rows) { this.rows.push(...rows); }
    getNumberOfColumns() { return this.columns.length; }
    getNumberOfRows() { return this.rows.length; }
    setProperty() {}
    setCell(row, column, value) { this.rows[row][column] = value; }
    getValue(row, column) { return this.rows[row][column]; }
  }
  const shown = (cell) => (cell && typeof cell === "object" ? cell.f ?? cell.v : cell);
  const short = (cell) => (typeof cell === "number" ? +cell.toPrecision(4) : cell);
  const keep = (text) => !/^\s*</.test(text); // tooltips are pages of their own
  class Chart {
    constructor(element) { this.element = element; }
    draw(data) {
      const rows = data.rows.slice(0, 12).map((row) => row.map(shown).map(short));
      const filled = data.columns.map((_, i) => rows.some((row) => row[i] != null && keep(row[i])));
      const line = (cells) => cells.filter((_, i) => filled[i]).join(" · ");
      const lines = [data.columns.map((name) => name || "–"), ...rows].map(line);
      this.element.innerText = ["[stand-in for a chart]", ...lines].join("\n");
    }
    clearChart() { this.element.innerText = ""; }
    setSelection() {}
    getSelection() { return []; }
  }
  const kinds = ["ColumnChart", "ComboChart", "LineChart", "PieChart", "SteppedAreaChart", "Table",
    "Timeline", "AreaChart"];
  const arrayToDataTable = ([head, ...rows]) => {
    const table = new DataTable();
    head.forEach((label) => table.addColumn("", label?.label ?? label?.role ?? label));
    table.addRows(rows);
    return table;
  };
  window.google = {
    charts: { load: () => Promise.resolve(), setOnLoadCallback: (call) => call() },
    visualization: {
      DataTable, arrayToDataTable, events: { addListener: () => {} },
      ...Object.fromEntries(kinds.map((kind) => [kind, Chart])),
    },
  };
})();
