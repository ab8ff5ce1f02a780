// Numbers as they are now: Grafana's BigValue, one a series.
import { getDisplayValueAlignmentFactors, getFieldDisplayValues } from '@grafana/data';
import { BigValue, VizRepeater } from '@grafana/ui';

export function Figures({ panel, theme, width, height }) {
  const { options, series, fieldConfig } = panel;
  const values = getFieldDisplayValues({
    data: series, reduceOptions: options.reduceOptions, fieldConfig, replaceVariables: (text) => text, theme, timeZone: 'utc',
  });
  return (
    <VizRepeater
      getValues={() => values}
      getAlignmentFactors={getDisplayValueAlignmentFactors}
      renderValue={({ value, alignmentFactors, width, height, count }) => (
        <BigValue
          value={value.display}
          count={count}
          width={width}
          height={height}
          theme={theme}
          alignmentFactors={alignmentFactors}
          colorMode={options.colorMode}
          graphMode={options.graphMode}
          justifyMode={options.justifyMode}
          textMode={options.textMode}
          text={options.text}
        />
      )}
      source={series}
      renderCounter={0}
      itemSpacing={3}
      width={width}
      height={height}
      orientation={options.orientation}
      autoGrid
    />
  );
}
