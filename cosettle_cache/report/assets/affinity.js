// From small tokens to affinity: what is computed in the page, and nothing about how it looks.
"use strict";
report.affinity = {
  bytes(text) {
    return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  },

  // Tokens, neighbours and cosines of one kind, from the text they travel as.
  unpack(kind) {
    const { bytes } = report.affinity;
    return {
      channels: kind.channels,
      k: kind.k,
      scale: Float32Array.from(kind.scale),
      tokens: kind.tokens.map((text) => new Int8Array(bytes(text).buffer)),
      position: kind.position.map((text) => new Uint16Array(bytes(text).buffer)),
      cosine: kind.cosine.map((text) => new Int16Array(bytes(text).buffer)),
    };
  },

  // Cosines of patch `query` of the first frame with every patch of frame `frame`.
  cosines(kind, query, frame) {
    const { channels, scale, tokens } = kind;
    const first = tokens[0].subarray(query * channels, (query + 1) * channels);
    const weighted = scale.map((step, channel) => step * step * first[channel]);
    const keys = tokens[frame];
    const out = new Float32Array(keys.length / channels);
    for (let patch = 0; patch < out.length; patch += 1) {
      let sum = 0;
      for (let channel = 0; channel < channels; channel += 1) {
        sum += weighted[channel] * keys[patch * channels + channel];
      }
      out[patch] = sum;
    }
    return out;
  },

  // Softmax over all patches.
  soften(cosines, temperature) {
    const largest = cosines.reduce((a, b) => Math.max(a, b), -Infinity);
    const raised = cosines.map((value) => Math.exp((value - largest) / temperature));
    const sum = raised.reduce((a, b) => a + b, 0);
    return raised.map((value) => value / sum);
  },

  // How many patches, the heaviest first, hold half of the weight.
  half(weights) {
    const sorted = Float32Array.from(weights).sort().reverse();
    const total = sorted.reduce((a, b) => a + b, 0);
    let sum = 0;
    const index = sorted.findIndex((weight) => (sum += weight) >= total / 2);
    return index + 1;
  },

  range(values) {
    return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
  },

  // The listed neighbours of `query` in frame `frame`, which counts from 1.
  nearest(kind, query, frame) {
    const { k, position, cosine } = kind;
    return Array.from({ length: k }, (_, rank) => ({
      position: position[frame - 1][query * k + rank],
      cosine: cosine[frame - 1][query * k + rank] / 32767,
    }));
  },
};
