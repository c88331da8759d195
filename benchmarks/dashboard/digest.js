/* A name for a text, different for different texts: asv's page hides a regression under it and asks no more of md5. */
function md5(text) { return encodeURIComponent(text); }
