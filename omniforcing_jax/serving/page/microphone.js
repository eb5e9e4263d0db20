// Collects what the microphone hears, and hands it over five times a second.

class Microphone extends AudioWorkletProcessor {
  constructor() {
    super();
    this.parts = [];
    this.count = 0;
  }

  process([[channel]]) {
    if (channel) {
      this.parts.push(channel.slice());
      this.count += channel.length;
    }
    if (this.count >= sampleRate / 5) {
      const samples = new Float32Array(this.count);
      let at = 0;
      for (const part of this.parts) {
        samples.set(part, at);
        at += part.length;
      }
      this.port.postMessage(samples);
      this.parts = [];
      this.count = 0;
    }
    return true;
  }
}

registerProcessor("microphone", Microphone);
