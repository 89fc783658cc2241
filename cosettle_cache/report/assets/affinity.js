// From small tokens to affinity: what is computed in the page, and nothing about how it looks.
"use strict";
report.affinity = {
  // Bytes that travel as base64 of a zlib stream.
  async bytes(text) {
    const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).arrayBuffer();
  },

  // Tokens, neighbours and cosines of one kind, from the text they travel as.
  async unpack(kind) {
    const each = (texts, Type) =>
      Promise.all(texts.map(async (text) => new Type(await report.affinity.bytes(text))));
    const [tokens, position, cosine] = await Promise.all([
      each(kind.tokens, Int8Array), each(kind.position, Uint16Array), each(kind.cosine, Int16Array),
    ]);
    return { step: kind.step, k: kind.k, tokens, position, cosine };
  },

  // Cosines of patch `query` of the first frame with each of the `count` patches of frame `frame`; tokens lie
  // channel by channel.
  cosines({ step, tokens }, count, query, frame) {
    const [first, keys] = [tokens[0], tokens[frame]];
    const out = new Float32Array(count);
    for (let start = 0; start < keys.length; start += count) {
      const weight = step * step * first[start + query];
      if (weight === 0) continue;
      for (let patch = 0; patch < count; patch += 1) out[patch] += weight * keys[start + patch];
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
