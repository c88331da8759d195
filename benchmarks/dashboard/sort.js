/* Tables sorted by a click on a heading: what asv's page needs of stupidtable, which no Python package ships. */
(function ($) {
    var compare = {
        "string": function (a, b) { return String(a).localeCompare(String(b)); },
        "float": function (a, b) { return parseFloat(a) - parseFloat(b); }
    };
    function value(row, column) {
        var cell = $(row).children().eq(column), given = cell.attr("data-sort-value");
        return given === undefined ? cell.text() : given;
    }
    $.fn.stupidtable = function (more) {
        return this.each(function () {
            var table = $(this).data("compare", $.extend({}, compare, more));
            table.on("click", "thead th", function () { $(this).stupidsort(); });
        });
    };
    $.fn.stupidsort = function (direction) {
        return this.each(function () {
            var heading = $(this), table = heading.closest("table"), column = heading.index();
            var by = table.data("compare")[heading.data("sort")];
            if (!by) return;
            direction = direction || (heading.data("sort-dir") === "asc" ? "desc" : "asc");
            var sign = direction === "asc" ? 1 : -1, body = table.children("tbody");
            body.append(body.children("tr").get().sort(function (a, b) {
                return sign * by(value(a, column), value(b, column));
            }));
            heading.data("sort-dir", direction).siblings().removeData("sort-dir");
            table.trigger("aftertablesort", { column: column, direction: direction });
        });
    };
})(jQuery);
