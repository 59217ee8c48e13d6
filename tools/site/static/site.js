// A button that copies a block of code, and folded definitions that open when a link leads to them
document.addEventListener('DOMContentLoaded', () => {
  document.querySelectorAll('div.cell_input div.highlight, article div[class^="highlight-"]:not(.highlight-none) > div.highlight').forEach(block => {
    const pre = block.querySelector('pre');
    if (!pre || block.querySelector('button.copy')) return;
    const button = document.createElement('button');
    button.className = 'copy';
    button.type = 'button';
    button.textContent = 'Copy';
    button.setAttribute('aria-label', 'Copy this code');
    button.addEventListener('click', async () => {
      await navigator.clipboard.writeText(pre.textContent);
      button.textContent = 'Copied';
      setTimeout(() => { button.textContent = 'Copy'; }, 1500);
    });
    block.appendChild(button);
  });
  const open = () => {
    const at = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const fold = at && at.closest('details');
    if (fold && !fold.open) { fold.open = true; at.scrollIntoView(); }
  };
  open();
  window.addEventListener('hashchange', open);
});
