/* Bars of several series side by side: what asv's page needs of flot-orderbars, which no Python package ships. */
(function ($) {
    function beside(plot, series, datapoints) {
        function ordered(s) { return s.bars.show && s.bars.order !== null; }
        if (!ordered(series)) return;
        var orders = plot.getData().filter(ordered).map(function (s) { return s.bars.order; });
        orders.sort(function (a, b) { return a - b; });
        var shift = (orders.indexOf(series.bars.order) - (orders.length - 1) / 2) * series.bars.barWidth;
        for (var i = 0; i < datapoints.points.length; i += datapoints.pointsize)
            if (datapoints.points[i] !== null) datapoints.points[i] += shift;
    }
    $.plot.plugins.push({
        init: function (plot) { plot.hooks.processDatapoints.push(beside); },
        options: { series: { bars: { order: null } } },
        name: "beside",
        version: "1"
    });
})(jQuery);
