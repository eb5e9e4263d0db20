// The page of a live stream. It speaks the protocol of docs/protocol.md and asks nobody else.

const $ = (id) => document.getElementById(id);
const video = $("video");
const token = new URLSearchParams(location.search).get("token");
const query = token ? `?token=${encodeURIComponent(token)}` : "";
const EXAMPLES = [
  "a small red ball bounces in a light room",
  "a large blue ball and a small yellow ball bounce in a dark room",
  "a medium green ball hops",
];
const PIECE = 5; // seconds of a sound file that are sent at once
const AHEAD = 15; // seconds of it that are sent beyond what is made

let stream = null; // the one that runs
let given = null; // {name, kind: "image" | "sound" | "microphone", ...} for the next start
let left = sessionStorage.getItem("session"); // name of a session that can be taken up again
let history = JSON.parse(localStorage.getItem("history") || "[]");

function say(text, problem = false) {
  $("state").textContent = text;
  $("state").classList.toggle("problem", problem);
}

function show(id, text) {
  $(id).textContent = text;
}

const seconds = (x) => `${x.toFixed(2)} s`;

// What arrives, as MediaSource plays it

class Player {
  constructor() {
    this.source = new MediaSource();
    this.waiting = [];
    this.parts = []; // everything, for the download
    this.buffer = null;
    this.over = false;
    video.src = URL.createObjectURL(this.source);
    this.opened = new Promise((resolve) =>
      this.source.addEventListener("sourceopen", resolve, { once: true }));
  }

  async begin(mime) {
    if (!MediaSource.isTypeSupported(mime)) {
      throw new Error(`this browser does not play ${mime}`);
    }
    await this.opened;
    this.buffer = this.source.addSourceBuffer(mime);
    this.buffer.addEventListener("updateend", () => this.feed());
    this.feed();
  }

  push(bytes) {
    this.parts.push(bytes);
    this.waiting.push(bytes);
    this.feed();
  }

  feed() {
    if (!this.buffer || this.buffer.updating || this.source.readyState !== "open") return;
    const ranges = this.buffer.buffered;
    if (ranges.length && video.currentTime - ranges.start(0) > 120) {
      this.buffer.remove(0, video.currentTime - 60); // a browser keeps a few minutes only
    } else if (this.waiting.length) {
      this.buffer.appendBuffer(this.waiting.shift());
    } else if (this.over) {
      this.source.endOfStream();
    }
  }

  // Seconds that can be played.
  get end() {
    const ranges = this.buffer ? this.buffer.buffered : [];
    return ranges.length ? ranges.end(ranges.length - 1) : 0;
  }

  // A browser that stood still is behind from then on, and a new prompt is seen that much later: it
  // plays a tenth faster until it has no more in store than was made ahead.
  catchUp(lead) {
    const behind = this.end - video.currentTime - Math.max(lead, 0);
    if (behind > 1.5) video.playbackRate = 1.1;
    else if (behind < 0.5) video.playbackRate = 1;
  }

  close() {
    this.over = true;
    video.playbackRate = 1;
    this.feed();
  }
}

// One session

class Stream {
  constructor(first, given) {
    this.player = new Player();
    this.first = first;
    this.given = given;
    this.blocks = []; // {block, end} of each that was made
    this.made = 0;
    this.late = 0;
    this.asked = performance.now();
    this.switched = null; // [when, from which second on] of the last prompt
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    this.socket = new WebSocket(`${scheme}://${location.host}/session${query}`);
    this.socket.binaryType = "arraybuffer";
    this.socket.onmessage = ({ data }) => {
      if (data instanceof ArrayBuffer) this.player.push(data);
      else this.receive(JSON.parse(data));
    };
    this.socket.onclose = () => this.end("the server is gone", true, true);
  }

  send(message, data) {
    if (this.socket.readyState !== WebSocket.OPEN) return;
    this.socket.send(JSON.stringify(message));
    if (data) this.socket.send(data);
  }

  receive(message) {
    switch (message.type) {
      case "hello":
        this.hello = message;
        this.send(this.first);
        say(this.first.prompt ? "The prompt is being encoded …" : "The session is being looked for …");
        break;
      case "waiting":
        say(`All places are taken: you are number ${message.position} in the queue.`);
        break;
      case "begun":
        say("The stream begins …");
        keep(message.session);
        this.session = message.session;
        $("seed").placeholder = `a new one each time (this one: ${message.seed})`;
        this.give();
        break;
      case "media":
        this.player.begin(message.mime).catch((error) => this.end(error.message, true));
        this.progress = setInterval(
          () => this.send({ type: "progress", seconds: this.player.end }), 500);
        break;
      case "block":
        this.block(message);
        break;
      case "load":
        say(`Much to do here: ${message.steps} steps a block` +
          (message.waiting ? "." : ", and nobody may wait for a place."));
        break;
      case "problem":
        say(message.message, true);
        break;
      case "ended":
        this.end(message.reason, message.failed, message.saved);
        break;
    }
  }

  block(message) {
    const rate = message.end - this.made;
    this.made = message.end;
    this.blocks.push({ block: message.block, end: message.end });
    this.late += message.late;
    if (rate > 0) show("speed", `${(rate * this.hello.frame_rate / message.took).toFixed(0)} FPS`);
    show("lead", seconds(message.lead));
    show("late", seconds(this.late));
    this.player.catchUp(message.lead);
    this.feedSound();
  }

  // What was chosen before the start
  give() {
    if (!this.given) return;
    if (this.given.kind === "image") {
      this.send({ type: "image" }, this.given.bytes);
    } else if (this.given.kind === "sound") {
      this.sent = 0;
      this.feedSound();
    } else {
      this.given.listen((rate, samples) => this.send({ type: "audio", rate }, samples));
    }
  }

  feedSound() {
    if (this.given?.kind !== "sound") return;
    const { rate, samples } = this.given;
    while (this.sent < samples.length && this.sent / rate < this.made + AHEAD) {
      const piece = samples.subarray(this.sent, this.sent + PIECE * rate);
      this.send({ type: "audio", rate }, piece.slice().buffer);
      this.sent += piece.length;
    }
  }

  change(prompt, blend) {
    this.switched = [performance.now(), this.made];
    this.send({ type: "prompt", text: prompt, blend });
    say(`Next: ${prompt}`);
  }

  // What follows is as if the last seconds had not been
  back(by) {
    const from = Math.max(0, video.currentTime - by);
    const shown = this.blocks.find(({ end }) => end > from);
    if (!shown) return;
    this.send({ type: "rewind", block: shown.block });
    say(`Back to block ${shown.block}, once what is made was shown.`);
  }

  reseed(seed) {
    this.send({ type: "seed", seed });
    $("seed").placeholder = `a new one each time (this one: ${seed})`;
    say(`Seed ${seed} from the next block on.`);
  }

  end(reason, failed, saved = false) {
    if (this.over) return;
    this.over = true;
    clearInterval(this.progress);
    this.given?.stop?.();
    this.player.close();
    this.socket.close();
    say(failed || saved ? `The stream ended: ${reason}` : "The stream has ended.", failed);
    keep(saved ? this.session || left : null);
    if (this.session && !saved) {
      $("turns").href = `/turns/${this.session}${query}`;
      $("turns").hidden = false;
    }
    if (this.player.parts.length) {
      $("download").href = URL.createObjectURL(new Blob(this.player.parts, { type: "video/mp4" }));
      $("download").download = "stream.mp4";
      $("download").hidden = false;
    }
    buttons(false);
  }
}

video.addEventListener("playing", () => {
  if (stream && !stream.seen) {
    stream.seen = true;
    show("first", seconds((performance.now() - stream.asked) / 1000));
    say("");
  }
});

video.addEventListener("timeupdate", () => {
  show("position", `${video.currentTime.toFixed(1)} s`);
  if (stream?.switched && video.currentTime >= stream.switched[1]) {
    show("switch", seconds((performance.now() - stream.switched[0]) / 1000));
    stream.switched = null;
    say("");
  }
});

// Steering

// Remembers a session that can be taken up again, also when the page is left
function keep(session) {
  left = session;
  if (session) sessionStorage.setItem("session", session);
  else sessionStorage.removeItem("session");
}

function buttons(running) {
  $("back").disabled = $("reseed").disabled = !running;
  $("again").hidden = running || !left;
  $("go").textContent = running ? "Change prompt" : "Start";
  $("pause").disabled = $("stop").disabled = !running;
  $("pause").textContent = "Pause";
}

function remember(prompt) {
  history = [prompt, ...history.filter((other) => other !== prompt)].slice(0, 20);
  localStorage.setItem("history", JSON.stringify(history));
  list();
}

function list() {
  const all = [...history, ...EXAMPLES.filter((text) => !history.includes(text))];
  $("history").replaceChildren(...all.map((text) => {
    const item = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.onclick = () => {
      $("prompt").value = text;
      go();
    };
    item.append(button);
    return item;
  }));
}

function go() {
  const prompt = $("prompt").value.trim();
  if (!prompt) {
    say("Type a prompt first.", true);
    $("prompt").focus();
    return;
  }
  const seed = $("seed").value.trim();
  if (seed && !/^\d{1,10}$/.test(seed)) {
    say("The seed must be a whole number.", true);
    return;
  }
  remember(prompt);
  if (stream && !stream.over) {
    stream.change(prompt, number("blend"));
    return;
  }
  const sound = given !== null && given.kind !== "image";
  begin({ type: "start", prompt, seed: seed ? Number(seed) : null, sound }, given);
}

// A number field, within its bounds
function number(id) {
  const { value, min, max } = $(id);
  return Math.min(Math.max(Math.round(Number(value) || 0), Number(min)), Number(max));
}

function begin(first, given) {
  if (!("MediaSource" in window)) {
    say("This browser has no MediaSource and cannot play the stream; use a recent one.", true);
    return;
  }
  for (const id of ["first", "speed", "lead", "switch", "late", "position"]) show(id, "–");
  $("download").hidden = $("turns").hidden = true;
  stream = new Stream(first, given);
  video.play().catch(() => say("Press play: this browser does not start sound by itself.", true));
  hear();
  buttons(true);
}

function stop() {
  if (!stream || stream.over) return;
  stream.send({ type: "stop" });
}

function pause() {
  const paused = $("pause").textContent === "Pause";
  stream.send({ type: paused ? "pause" : "resume" });
  if (paused) video.pause();
  else video.play();
  $("pause").textContent = paused ? "Resume" : "Pause";
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  go();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    go();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
$("stop").onclick = stop;
$("back").onclick = () => stream.back(number("back-by"));
$("reseed").onclick = () => stream.reseed(Math.floor(Math.random() * 2 ** 32));
$("again").onclick = () => begin({ type: "take_up", session: left }, null);
$("pause").onclick = pause;

// Pictures, sounds, the microphone

async function take(file) {
  if (file.type.startsWith("image/")) {
    const bytes = await file.arrayBuffer();
    if (stream && !stream.over) {
      stream.send({ type: "image" }, bytes);
      say(`${file.name} begins the next block.`);
      return;
    }
    choose({ kind: "image", name: file.name, bytes });
  } else {
    if (stream && !stream.over) {
      say("A sound drives a stream from its start: stop this one first.", true);
      return;
    }
    try {
      const decoded = await audio().decodeAudioData(await file.arrayBuffer());
      choose({ kind: "sound", name: file.name, rate: decoded.sampleRate, samples: mono(decoded) });
    } catch {
      say(`${file.name} is no picture and no sound that this browser reads.`, true);
    }
  }
}

function choose(what) {
  given = what;
  $("given").textContent = what ? `${what.name} is given to the next stream` : "";
  $("forget").hidden = !what;
}

function whole(samples) {
  return Int16Array.from(samples, (x) => Math.max(-1, Math.min(1, x)) * 32767);
}

function mono(decoded) {
  const channels = [...Array(decoded.numberOfChannels).keys()].map((n) => decoded.getChannelData(n));
  return whole(channels[0].map((_, i) => channels.reduce((sum, c) => sum + c[i], 0) / channels.length));
}

async function microphone() {
  try {
    const media = await navigator.mediaDevices.getUserMedia({ audio: { echoCancellation: true } });
    await audio().audioWorklet.addModule("microphone.js");
    const node = new AudioWorkletNode(audio(), "microphone");
    let send = () => {};
    node.port.onmessage = ({ data }) => send(audio().sampleRate, whole(data).buffer);
    audio().createMediaStreamSource(media).connect(node);
    choose({
      kind: "microphone",
      name: "what you say",
      listen: (to) => { send = to; },
      stop: () => {
        node.disconnect();
        media.getTracks().forEach((track) => track.stop());
        choose(null);
      },
    });
  } catch (error) {
    say(`No microphone: ${error.message}`, true);
  }
}

$("microphone").onclick = microphone;
$("forget").onclick = () => {
  given?.stop?.();
  choose(null);
};
$("file").onchange = () => $("file").files[0] && take($("file").files[0]);
$("drop").onclick = () => $("file").click();
$("drop").onkeydown = (event) => event.key === "Enter" && $("file").click();
for (const type of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(type, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", type === "dragover");
    if (type === "drop" && event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
  });
}

// The waveform of what is heard

let context = null;
let analyser = null;

function audio() {
  context ??= new AudioContext();
  return context;
}

function hear() {
  audio().resume();
  if (analyser) return;
  analyser = audio().createAnalyser();
  analyser.fftSize = 2048;
  audio().createMediaElementSource(video).connect(analyser).connect(audio().destination);
  draw(new Float32Array(analyser.fftSize));
}

function draw(samples) {
  const canvas = $("wave");
  const pen = canvas.getContext("2d");
  canvas.width = canvas.clientWidth;
  analyser.getFloatTimeDomainData(samples);
  pen.strokeStyle = getComputedStyle(document.body).color;
  pen.beginPath();
  samples.forEach((x, i) =>
    pen.lineTo(i / samples.length * canvas.width, canvas.height * (0.5 - 0.48 * x)));
  pen.stroke();
  requestAnimationFrame(() => draw(samples));
}

list();
buttons(false);
$("prompt").focus();
