// Draws one dashboard: `draw(data)`, with what pictures.py gathered, sets `data-drawn` on the body when it stands.
import './setup.js';

import { createTheme, ThemeContext } from '@grafana/data';
import { GlobalStyles, PortalContainer } from '@grafana/ui';
import { createRoot } from 'react-dom/client';

import { Board } from './board.jsx';
import { prepared } from './data.js';

const theme = createTheme({ colors: { mode: 'dark' } });
const FONTS = ['400 14px Inter', '500 14px Inter', '400 14px "Roboto Mono"'];

// charts measure texts when they are made, and icons come one by one: both must be there before the picture is taken
async function settled() {
  let before = '';
  for (let same = 0; same < 3; ) {
    await new Promise((next) => setTimeout(next, 150));
    const now = document.getElementById('board').innerHTML;
    same = now === before ? same + 1 : 0;
    before = now;
  }
}

window.draw = async (data) => {
  const root = createRoot(document.getElementById('board'));
  const show = (board) =>
    root.render(
      <ThemeContext.Provider value={theme}>
        <GlobalStyles isExtensionSidebarOpen={false} />
        {board}
        <PortalContainer />
      </ThemeContext.Provider>
    );
  show(null); // the styles name the fonts
  await settled();
  await Promise.all(FONTS.map((font) => document.fonts.load(font)));
  show(<Board {...data} panels={await prepared(data, theme)} theme={theme} />);
  await settled();
  document.body.dataset.drawn = 'yes';
};
